"""Several names a row: the mean of the embeddings of those that are known."""

import pandas as pd
import torch

from bertforge.columns.parts import MeanEmbedding
from bertforge.columns.several_names import MOST_NAMES, SeveralNames, SeveralNamesSettings, SeveralNamesShape

KIND, SETTINGS = SeveralNames(), SeveralNamesSettings("m")


def test_known_names_are_kept_in_their_order_and_zero_fills_the_end():
    learnt = KIND.fit(pd.DataFrame({"m": ["w v", "v w u", None, ""]}), SETTINGS, min_count=2)
    assert learnt.multi_vocabulary == ("v", "w")
    rows = pd.DataFrame({"m": ["w  new v", "u", None, "v"]})
    assert KIND.encode(rows, SETTINGS, learnt).tolist() == [[2, 1], [0, 0], [0, 0], [1, 0]]
    assert KIND.encode(rows.iloc[1:3], SETTINGS, learnt).tolist() == [[0], [0]], "never without a column"
    assert KIND.shape(SETTINGS, learnt) == SeveralNamesShape(3)


def test_a_row_has_no_more_names_than_are_read_however_many_it_brings():
    learnt = KIND.fit(pd.DataFrame({"m": ["v w"] * 2}), SETTINGS, min_count=2)
    many = KIND.encode(pd.DataFrame({"m": ["w " + "v " * 50_000, "w"]}), SETTINGS, learnt)
    assert many.shape == (2, MOST_NAMES)
    assert many[0].tolist() == [2] + [1] * (MOST_NAMES - 1)


def test_a_row_is_the_mean_of_the_values_present():
    embed = MeanEmbedding(5, 4)
    one, two = embed.weight[1], embed.weight[2]
    mean = embed(torch.tensor([[1, 2, 0], [1, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(mean, torch.stack([(one + two) / 2, one, torch.zeros(4)]))


def test_the_row_of_number_zero_learns_nothing():
    embed = MeanEmbedding(3, 2)
    embed(torch.tensor([[1, 0], [0, 0]])).sum().backward()
    assert embed.weight.grad.abs().sum(dim=1).tolist() == [0, 2, 0]
