"""From NeMo's modules to verified ONNX graphs, in float32 or float16.

options     what an export is asked for
pipeline    the steps of an export, in the order in which export_parakeet_to_onnx.py calls them
wrappers    the three modules that are exported; layers: what the encoder consists of
trace       a module → an .onnx and a .data file
parity      the comparison of each graph with NeMo's module
ranges      the largest values inside the graphs, measured on speech; float16 converts what they allow
writing     which scripts the text may be in: a bias for tokens with letters of others
typed_graph a graph with the type of every value known, and a session that changes nothing in it
"""
