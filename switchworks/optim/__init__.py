"""T5's Adafactor, AdamW, learning-rate schedules as functions of the step, clipping."""
