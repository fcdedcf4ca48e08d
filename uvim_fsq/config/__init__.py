"""The configuration: schema, parsing, validation and plugin imports. Independent of tasks; does not import torch."""
