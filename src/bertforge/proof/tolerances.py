"""Every tolerance of every proof, and why it is what it is.

None is a number of logits that fits one model: what may differ is set against how far the model's own logits lie apart,
or against what the precision does to this very model in simulation; or it is a share of labels, which means the same
to every model.
"""

SAVED = 2e-3
"""Logits of golden rows when a folder is loaded, float32 against float32. Another device, or another pack, sums in
another order, which moves a logit by up to 1e-4; bfloat16 would move it by 1e-2 and more."""

MERGED = 1e-5
"""The largest difference of a logit of a merged model from its adapters beside the base, both in float64, as a share of
the largest logit, or of 1 where all are smaller. Rounding the merged weights to float32 leaves 1e-8 (all-MiniLM-L6-v2
and BERT-base, every linear layer adapted); a wrong scale of an adapter that has hardly learnt moves one by 1e-3."""

STRUCTURE = 5e-4
"""The largest difference of a logit on the structural probes, where nothing is rounded on the way, as a share of the
spread of the model's logits. Healthy graphs give 1e-6 to 2e-5 (ONNX Runtime and OpenVINO, float32, stored weights in
float32 or 8 bits); a zero point that is off by one step in one place gives 1e-2, one of 72 heads lost 5e-2, a mask of
-3 gives 1e-1."""

SHIFT_RATIO = 3.0
"""How far an engine's probabilities may move on average, as a multiple of what its precision does in simulation. It
rounds in more places than the simulation, and rounds other values up: healthy engines lie between 0.2 and 1.8."""

SHIFT_FLOOR = 1e-4
"""Probability by which rows may move on average whatever the simulation says: with a simulated shift of nearly 0, as in
float32, a ratio means nothing, and a ten-thousandth decides nothing."""

SHIFT_Z = 2.6
"""Standard errors on either side of the mean shift: 99%."""

ACCURACY_LOSS = 0.003
"""Accuracy that an engine may cost, a fraction. It is refused when the interval of what it costs lies above."""

ACCURACY_Z = 1.96
"""Standard errors on either side of the paired difference of accuracy: 95%."""

WORST_RATIO, WORST_FLOOR = 5.0, 0.01
"""How far a single row may move, as a multiple of the row that moves most in simulation, and beyond it. It is another
row for the engine, and the largest of a few hundred is no steady figure; a row that is lost moves by 0.3 and more."""

CHANGED_LABELS = 0.05
"""Share of the labels that an engine may change, whatever the simulation says: where more is shown, the precision costs
this model too much, and layers are spared. Healthy INT8 engines change up to 2%, of 77 classes."""

FIRST_ROWS = 1000
"""Rows that are asked first: 652 that all agree are the fewest that show that no more than ACCURACY_LOSS is lost. Where
they cannot tell, four times as many are asked, up to all."""

LEFT = 5e-4
"""Share of all rows that an engine's margin is chosen to leave with another label than the model's, once the rows
within it were asked again. It is half of the 0.1% that may be left. Chosen for 0.1%, margins left more in 13% of the
draws of 1,000 rows; chosen for half of it, in 2% (`margin` has the table)."""
