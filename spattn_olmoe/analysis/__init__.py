"""Pictures and statistics of what was trained: mask pictures, head diversity and entropy, result tables."""
