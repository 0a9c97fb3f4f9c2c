//! QEMU: its command line (pure), its process, its monitor (QMP), migration.

pub mod argv;
pub mod migrate;
pub mod process;
pub mod qmp;
