"""8 bits by NVIDIA ModelOpt: simulated quantization in PyTorch, its calibration, and what each part of it costs.

`points` names what can be quantized, `fake` puts ModelOpt's quantizers into a model of ours, `calibrate` finds their
ranges, `sensitivity` measures what they cost and chooses which to keep.
"""

import warnings

# ModelOpt names the transformers versions it was tested with; nothing here goes through transformers.
warnings.filterwarnings("ignore", message="transformers .* is not tested with current version of modelopt")
