"""The model folders of each runtime. Importing this package registers every layout, in the order of writing.

onnx-asr's joined graph must be made from files that no other folder shares yet, since onnx_ir does not accept files
with several hard links. So GenAI's folder is written first and onnx-asr's second.
"""

from common.layouts.genai import GENAI
from common.layouts.layout import LAYOUTS, Layout, Window, layout_of, layouts_in
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX

__all__ = ["GENAI", "LAYOUTS", "ONNX_ASR", "SHERPA_ONNX", "Layout", "Window", "layout_of", "layouts_in"]
