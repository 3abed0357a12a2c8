"""CRATE and GPT-2 as Hugging Face models, and hook points on any decoder."""
