"""Our models beside transformers' and PEFT's. These tests alone import the two libraries."""
