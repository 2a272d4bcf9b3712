"""What the five scripts share, in pipeline order.

graphs, model, wrappers, export, parity, tokenizer, configs, identity, optimize, runtime, decode, transcripts, verdict;
console and files serve all.
"""
