"""T5, mT5 and Switch Transformers checkpoints of transformers: settings and weights."""
