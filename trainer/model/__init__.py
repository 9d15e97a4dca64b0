"""The model: its weights, its attention over packed documents, its loss, its noise."""
