"""The analyses of the papers in docs: functions over activations and loaded SAEs, and their figures. They know nothing of Ray or MLflow."""
