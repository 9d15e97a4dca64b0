"""Manifests for Kubernetes: templates in YAML, and what fills them in."""
