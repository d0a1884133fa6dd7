"""Evaluation: how good are these logits, how sure are we, and where do they go wrong? Knows nothing of BERT.

They take logits `[rows, labels]` and integer labels `[rows]` as NumPy arrays; `baselines`, `boosting` and `standing`
read prepared data, and the last two run a model.

- `metrics`: loss, accuracy, precision, recall, F1, ROC-AUC, calibration error and confusion matrix, with intervals.
- `compare`: a paired test between two runs on the same rows.
- `temperature`: the one number that makes probabilities honest; `prior`: the same where labels have other shares.
- `decisions`: thresholds, and what they do to rows; `binomial`: the bound they are chosen by.
- `drift`: whether served rows look like those of training.
- `baselines`, `boosting`: what word counts and the columns alone reach on prepared data; `standing`: a model beside it.
- `groups`: accuracy by text length and by month; the most confident mistakes.
- `curves`: the points of the ROC curve and of the reliability diagram.
- `report`: all of it as one HTML file (`figures` draws, `report.html.j2` lays out), or as Markdown.
- `bootstrap`, `scores`: what the above share: estimates with intervals, checked logits.
- `logits`: the one loop that puts rows to a model, whatever it is.
- `golden`: rows saved with a model, to show later that it still computes the same function.
"""
