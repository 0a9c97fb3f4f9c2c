//! QEMU: its command line (pure), its process, its monitor (QMP).

pub mod argv;
pub mod process;
pub mod qmp;
