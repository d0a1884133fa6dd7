"""One name a row: known names have a number and an embedding, all others share 0."""

import pandas as pd
import torch

from bertforge.columns.categorical import Categorical, CategoricalSettings, CategoricalShape

KIND, SETTINGS = Categorical(), CategoricalSettings(("c", "k"))
TRAIN = pd.DataFrame({"c": ["b", "a", "b", "a", "rare", ""], "k": [1, 1, 2, 2, None, 3]})


def test_frequent_names_are_numbered_and_every_other_is_zero():
    learnt = KIND.fit(TRAIN, SETTINGS, min_count=2)
    assert learnt.vocabularies == (("a", "b"), ("1.0", "2.0")), "sorted; numbers are names too"
    rows = pd.DataFrame({"c": ["a", "b", "rare", None, "new"], "k": [2.0, None, 3, 1, 4]})
    assert KIND.encode(rows, SETTINGS, learnt).tolist() == [[1, 2], [2, 0], [0, 0], [0, 1], [0, 0]]
    assert KIND.shape(SETTINGS, learnt) == CategoricalShape((3, 3))
    assert KIND.fit(TRAIN, SETTINGS, min_count=1).vocabularies[0] == ("a", "b", "rare")


def test_each_column_has_embeddings_of_its_own_side_by_side():
    embed = KIND.modules(CategoricalShape((3, 2)), embedding_size=2)["categorical"]
    first, second = (table.weight for table in embed.children())
    expected = torch.stack([torch.cat([first[2], second[0]]), torch.cat([first[0], second[1]])])
    assert torch.equal(embed(torch.tensor([[2, 0], [0, 1]])), expected)
    assert embed.out_features == 4


def test_without_columns_there_is_no_module():
    assert KIND.modules(CategoricalShape(), embedding_size=2) == {}
