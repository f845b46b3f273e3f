"""Train sparse mixture-of-experts encoder-decoder models from raw text."""
