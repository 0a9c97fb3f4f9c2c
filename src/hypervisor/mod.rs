//! Hypervisors: what makes a virtual machine run. QEMU is the one there is.
//!
//! Does not know of pools, agents or gRPC.

pub mod qemu;
