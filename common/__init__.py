"""What the five scripts share, in pipeline order.

graphs, download, model, wrappers, export, parity, tokenizer, configs, optimize, runtime, decode; console and files
serve all.
"""
