"""The four configurations of the contract of the tasks, as they stand there."""

SFT = """\
task_type: sft
model_name: qwen-7b
dataset: datasets/sft_dataset.jsonl     # must be the project's dataset_name
max_seq_length: 2048
per_device_train_batch_size: 4
learning_rate: 2e-5
num_train_epochs: 3
"""
RL = """\
task_type: rl
algorithm: ppo            # also: grpo, rloo, dpo, kto, orpo, reward (trains a reward model)
policy_model: qwen-7b-sft
reward_model: qwen-7b-rm  # a local checkpoint, or the URL of a reward service
dataset: datasets/rl_preference.jsonl
rollout_batch_size: 16
update_epochs: 4
kl_target: 0.1
"""
LORA = """\
task_type: lora
base_model: llama2-7b
dataset: datasets/lora_demo.jsonl
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
train_batch_size: 64
gradient_accumulation_steps: 4
use_8bit: true            # optional: peft_target_modules, bnb_4bit_quant_type, use_4bit
"""
PRETRAIN = """\
task_type: pretrain
model_name: llama2-7b
dataset: datasets/pretrain_corpus.jsonl
sequence_length: 4096
global_batch_size: 1024   # = per-device batch × data parallelism × accumulation
learning_rate: 3e-4
warmup_ratio: 0.01
tokenizer: configs/tokenizer.model
"""
