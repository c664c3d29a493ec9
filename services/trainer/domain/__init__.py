"""What the trainer thinks in: runs and versions (`runs`), sizes of models (`hyper_parameters`). Pure."""
