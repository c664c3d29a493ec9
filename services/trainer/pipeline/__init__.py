"""What a run does, stage by stage. Only the run's own process imports `transformer`, `training` and `export`.

hyper_parameters  named sizes                 transformer  the model (TensorFlow)
log_reader        Postgres -> arrays          training     the loop, sparse Adam
dataset           cleaning and splits         export       TensorFlow -> LiteRT, parity
packing           people -> rows of tokens    evaluation   the ladder, with intervals
cooccurrence      the counted companion       gate, card   the verdict, and its reader
"""
