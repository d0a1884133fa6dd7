"""A plain model -> an ONNX graph: written node by node, so that every type and every Q/DQ pair is where we put it."""
