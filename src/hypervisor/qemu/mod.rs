//! QEMU: its command line (pure), its process, its monitor (QMP), migration, hotplug.

pub mod argv;
pub mod hotplug;
pub mod migrate;
pub mod process;
pub mod qmp;
