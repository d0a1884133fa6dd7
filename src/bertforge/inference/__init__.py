"""From a finished run or a merged model to predictions: the same text and column preparation as training."""
