"""The paper's tables and the experiment of its appendix, at its scale or a small one: plan, train, evaluate, report."""
