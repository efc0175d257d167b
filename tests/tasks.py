"""A task of lm-evaluation-harness that lies on this machine."""

from __future__ import annotations

DOCUMENTS = [
    {"question": "def f(", "choices": ["x", "y", " z"], "label": 1},
    {"question": "import", "choices": [" os", " sys"], "label": 0},
    {"question": "for i", "choices": [" in", "nto", "s"], "label": 2},
]
TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
