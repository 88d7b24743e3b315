"""The same model in transformers: out as a folder that stands alone, in from the published layout."""
