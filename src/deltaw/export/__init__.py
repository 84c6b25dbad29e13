"""Adapters and merged models in other tools' files: GGUF for llama.cpp, folders for PEFT, vLLM and LoRAX."""
