"""A report by language: figures 7 and 8 of the paper, and which experts serve which language."""
