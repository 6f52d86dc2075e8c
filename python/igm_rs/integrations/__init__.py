"""Trainers that take IGMOptimizer, one module for each; none is imported by the core.

- Lightning: ``class Model(IGMMixin, LightningModule)`` with ``igm_rs.integrations.lightning.IGMMixin``.
- Hugging Face: ``IGMTrainer(model, args, igm={"rho": 0.05})`` with ``igm_rs.integrations.transformers.IGMTrainer``.
- Accelerate: ``accelerator.prepare(model, opt, loader)``, then ``optimizer.step(closure)`` with
  ``accelerator.backward(loss)`` in the closure; within ``accumulate`` a list of closures; in fp16
  ``opt.replay(closure, scaler=accelerator.scaler)`` before ``optimizer.step()``; ``optimizer.optimizer.turn(name)``.
- skorch: ``NeuralNetClassifier(Module, optimizer=igm_rs.IGMOptimizer, optimizer__rho=0.05)``; nothing more is needed.
"""
