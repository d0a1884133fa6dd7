"""Ways to break an ONNX graph of ours so that it still runs: what a defect in an exporter or an engine would do."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Broken:
    """A graph to be broken in place."""

    def __init__(self, model):
        self.model, self.graph = model, model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(self, name):
        return numpy_helper.to_array(self.constants[name]).copy()

    def set(self, name, value):
        self.constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    def change(self, name, function):
        old = self.value(name)
        self.set(name, np.asarray(function(old)).astype(old.dtype))

    def weight(self, linear):
        """The constant of a linear layer's weight `[in, out]`, stored in 8 bits or not."""
        return next(name for name in self.constants if name in (f"{linear}.weight", f"{linear}.weight_int8"))

    def nodes(self, *kinds):
        return [node for node in self.graph.node if node.op_type in kinds]

    def reads(self, old, new):
        """Whoever reads value `old` reads `new`."""
        for node in self.graph.node:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new


def mask_dropped(broken):
    broken.change("masked", lambda value: 0 * value)


def mask_weak(broken):
    broken.change("masked", lambda value: 0 * value - 3)


def positions_shifted(broken):
    broken.change("position_embeddings", lambda table: np.roll(table, 1, axis=0))


def head_zeroed(broken, layer=1, head=0, heads=None):
    """What one head of attention gives is lost: its rows in the weight of attention's output."""

    def change(weight):
        size = len(weight) // heads
        weight[head * size : (head + 1) * size] = 0
        return weight

    broken.change(broken.weight(f"bert.encoder.layer.{layer}.attention.output.dense"), change)


def layer_skipped(broken, layer=0):
    norms = broken.nodes("LayerNormalization")  # of the embeddings, then two a layer
    after, before = norms[2 * layer + 2].output[0], norms[2 * layer].output[0]
    broken.reads(after, before)


def scale_doubled(broken, layer=0):
    name = f"bert.encoder.layer.{layer}.intermediate.dense"
    scale = f"{name}.weight_scale"
    broken.change(scale if scale in broken.constants else f"{name}.weight", lambda value: 2 * value)


def zero_point_off(broken, layer=0, steps=16):
    """The input of a layer is off by some of its 255 steps: where it is dequantized, or as its bias sees it."""
    name = f"bert.encoder.layer.{layer}.intermediate.dense"
    if f"{name}.scale" in broken.constants:
        zero = broken.graph.initializer.add()
        pair = [n for n in broken.nodes("DequantizeLinear") if n.input[1] == f"{name}.scale"]
        zero.CopyFrom(numpy_helper.from_array(np.array(steps, np.int8), "wrong_zero"))
        for node in pair:
            node.input[2] = "wrong_zero"
        return
    weight = broken.value(f"{name}.weight")  # [in, out]
    step = 8 / 127  # of an input that spans some 8 to both sides, as LayerNorm's output does
    broken.change(f"{name}.bias", lambda bias: bias - steps * step * weight.sum(0))


def wrong_activation(broken):
    for node in broken.nodes("Gelu"):
        node.op_type = "Relu"
        del node.attribute[:]


def norm_epsilon(broken, epsilon=0.1):
    for node in broken.nodes("LayerNormalization"):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = epsilon


def labels_swapped(broken):
    for kind in ("weight", "bias"):
        broken.change(f"classifier.{kind}", lambda value: np.concatenate([value[..., 1::-1], value[..., 2:]], -1))


def length_cut(broken, tokens=16):
    """The graph reads the first tokens alone."""
    graph = broken.graph
    for name, value in (("cut_start", 0), ("cut_end", tokens), ("cut_axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    for name in ("input_ids", "attention_mask"):
        broken.reads(name, f"{name}_cut")
        graph.node.insert(
            0,
            helper.make_node("Slice", [name, "cut_start", "cut_end", "cut_axis"], [f"{name}_cut"], name=f"{name}_cut"),
        )


def weights_stale(broken, share=0.1, seed=0):
    """Weights as they were some steps before: all a little off."""
    numbers = np.random.default_rng(seed)
    for name in [name for name in broken.constants if name.endswith("dense.weight")]:
        broken.change(name, lambda value: value + share * value.std() * numbers.standard_normal(value.shape))


PAIR = "bert.encoder.layer.0.intermediate.dense.scale"  # of an activation that stands in a pair of its own


def pair_scaled(broken, factor=1.1):
    """Dequantized with another scale than it was quantized with."""
    wrong = broken.graph.initializer.add()
    wrong.CopyFrom(numpy_helper.from_array(np.asarray(factor * broken.value(PAIR), np.float32), "wrong_scale"))
    for node in broken.nodes("DequantizeLinear"):
        if node.input[1] == PAIR:
            node.input[1] = "wrong_scale"


def pair_off_by_one(broken):
    zero_point_off(broken, steps=1)


def pair_too_narrow(broken):
    """A tenth of the range, on both sides."""
    broken.change(PAIR, lambda scale: scale / 10)


ALL = {
    function.__name__: function
    for function in (
        mask_dropped,
        mask_weak,
        positions_shifted,
        head_zeroed,
        layer_skipped,
        scale_doubled,
        zero_point_off,
        wrong_activation,
        norm_epsilon,
        labels_swapped,
        length_cut,
        weights_stale,
    )
}


def broken(path, sabotage, **given):
    """Breaks the graph in the file at `path`."""
    model = onnx.load(str(path))
    sabotage(Broken(model), **given)
    onnx.save(model, str(path))
