"""Text to batches: documents > tokenizer > store > span corruption > packing > Batch."""
