//! Loans under loom.
