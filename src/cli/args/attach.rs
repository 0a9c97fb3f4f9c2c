//! What `run` attaches to its VM.

use clap::Args;

use crate::vm::attach::{Format, Image, Network};

#[derive(Args, Debug)]
pub struct Attach {
    /// Disk image (one file system) as the command's root, or see --mount;
    /// written to unless `:ro` follows
    #[arg(long, value_name = "FILE[:ro]", value_parser = image)]
    pub image: Option<Image>,
    /// Format of the image [default: qcow2 when its name ends so, else raw]
    #[arg(long, value_name = "raw|qcow2", requires = "image")]
    pub image_format: Option<Format>,
    /// Mount the image there instead, an absolute path
    #[arg(long, value_name = "DIR", requires = "image", value_parser = absolute)]
    pub mount: Option<String>,
    /// Network card: `user[,by=qemu|passt]` (the guest reaches what this host reaches, by
    /// QEMU's network code in a process of its own, or by passt), or
    /// `tap=NAME[,netns=FILE][,ip=ADDRESS/LENGTH][,gateway=ADDRESS][,dns=ADDRESS]
    /// [,mac=MAC][,mtu=BYTES]` for a tap that exists; may be given again
    #[arg(long, value_name = "NETWORK")]
    pub net: Vec<Network>,
}

fn image(text: &str) -> Result<Image, String> {
    match text.strip_suffix(":ro") {
        Some("") | None if text.is_empty() || text == ":ro" => Err("no file named".into()),
        Some(path) => Ok(Image::new(path).read_only(true)),
        None => Ok(Image::new(text)),
    }
}

fn absolute(text: &str) -> Result<String, String> {
    let clean = text.trim_end_matches('/');
    if !clean.starts_with('/') || clean.split('/').any(|part| part == "..") {
        return Err("must be an absolute path without `..`, and not the root".into());
    }
    Ok(clean.into())
}
