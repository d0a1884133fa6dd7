"""Settings for every test, made before torch and huggingface_hub are imported: both read them only then."""

import os

# Nothing may reach for a model hub, whatever the machine running the tests allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests' models are tiny. One thread runs them as fast as two, and five times faster where the cores are shared:
# OpenMP's threads spin while they wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
