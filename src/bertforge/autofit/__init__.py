"""From a table to the best model and its fastest proved engine, in one call and a given time."""
