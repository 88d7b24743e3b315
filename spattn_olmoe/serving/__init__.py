"""What runs where an exported model is used: the code beside its weights, and vLLM's plugin. No OLMo-core here."""
