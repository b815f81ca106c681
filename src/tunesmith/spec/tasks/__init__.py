"""Training configurations in the words of the four tasks: sft, rl, lora, pretrain.

A dialect: flat keys with many spellings on one side, the specifications of `spec/train.py` on the
other. `keys.py` and `tasks.py` are data; `config.py` reads a configuration by them.
"""
