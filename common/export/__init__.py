"""From NeMo's modules to verified ONNX graphs, in float32 or float16.

pipeline  the settings and the steps of an export; the bias for tokens with letters of other scripts (writing systems)
wrappers  the three modules that are exported, and their export; layers: what the encoder consists of
parity    the comparison of each graph with NeMo's module
float16   the largest values inside the graphs, measured on speech, and the conversion of what they allow
"""
