"""Neuron analysis of language models; see README.md."""
