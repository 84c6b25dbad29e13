"""The nouns: places, weights, the normal forms, methods, adapters. Knows torch, not transformers."""
