"""Text to token ids, and token stores on disk."""
