"""From NeMo's modules to verified ONNX graphs, in float32 or float16.

options     the settings of an export
pipeline    the steps of an export, in the order in which export_parakeet_to_onnx.py calls them
wrappers    the three modules that are exported; layers: what the encoder consists of
trace       a module → an .onnx and a .data file
parity      the comparison of each graph with NeMo's module
ranges      the largest values inside the graphs, measured on speech; float16 converts what they allow
writing     limits the scripts of the text, by a bias for tokens with letters of other scripts
typed_graph a graph with the type of every value known, and a session that changes nothing in it
"""
