"""Examples on disk: ``prepare`` (all data of a recipe), ``encode_source`` (one source encoded), ``cache``
(memory-mapped entries), ``encoded_rows`` (examples as training reads them), ``epochs`` and ``epoch_order``
(steps, and the order of rows), ``hold_out`` (the choice of held-out rows), ``data_report`` (counts),
``row_writer`` (rows to a file)."""
