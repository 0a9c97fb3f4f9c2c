//! Commands by which a host is set up: guests, configurations, a package's files.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Json;
use crate::initrd::installed::GUEST;

/// What goes into an initramfs beside a kernel's own modules.
#[derive(Args, Debug)]
pub struct Contents {
    /// A static busybox, for a guest with a shell [default: for `guest build` the one that
    /// is installed, else none]
    #[arg(long, value_name = "BUSYBOX")]
    pub userland: Option<PathBuf>,
    /// Further modules to pack and load
    #[arg(long, value_name = "NAME")]
    pub module: Vec<String>,
    /// The guest agent [default: vmcache-agent beside this program, or in
    /// /usr/libexec/vmcache]
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Mkinitrd {
    /// A kernel's module directory, such as /lib/modules/6.1.0-amd64
    #[arg(long, value_name = "DIR")]
    pub kernel_modules: PathBuf,
    #[command(flatten)]
    pub contents: Contents,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Subcommand)]
pub enum Guest {
    /// Make kernel and initramfs of a kernel, its modules, busybox and the guest agent
    Build(GuestBuild),
}

#[derive(Args, Debug)]
pub struct GuestBuild {
    /// The kernel [default: the newest that is installed, one for virtual machines first]
    #[arg(long, value_name = "FILE", requires = "kernel_modules")]
    pub kernel: Option<PathBuf>,
    /// Its module directory
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub kernel_modules: Option<PathBuf>,
    #[command(flatten)]
    pub contents: Contents,
    /// Where the guest is to be, as vmlinuz and initramfs.img
    #[arg(long, short, value_name = "DIR", default_value = GUEST)]
    pub output: PathBuf,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub struct Generate {
    /// The directory to write to
    #[arg(value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a configuration file with every option as a comment
    Sample,
    /// Check the configuration and the files it names
    Check,
    /// Print every option with its value and where that stands
    Show {
        /// Print a table of all options in Markdown instead
        #[arg(long)]
        options: bool,
    },
    /// Write a configuration whose VMs another server's clients take for its own
    Import {
        /// The other server's socket
        #[arg(long, value_name = "SOCKET")]
        from_endpoint: PathBuf,
        /// The file to write; what clients are told is written beside it, as .served.json
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
}
