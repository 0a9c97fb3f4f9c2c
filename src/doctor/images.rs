//! The guest's kernel and initramfs: there, whole, and made for each other.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::{finding, good, Finding, State};
use crate::config::Config;
use crate::hypervisor::qemu::bzimage;
use crate::report::chain;

/// Largest initramfs that is looked into, in bytes.
const LARGEST: u64 = 256 * 1024 * 1024;
/// What stands in a kernel module before the version that it is for.
const MAGIC: &[u8] = b"vermagic=";

/// Whether they can be used.
pub fn images(config: &Config) -> Vec<Finding> {
    let name = "images";
    if let Err(e) = config.check_parts() {
        let remedy = "`vmcache guest build` makes both; `vmcache config check` says more";
        return vec![finding(name, State::Missing, chain(&e), remedy)];
    }
    if let Err((_, why)) = crate::confine::images::check(config) {
        return vec![finding(name, State::Missing, why, "mend it, or name other images")];
    }
    let size = |path: &Path| fs::metadata(path).map_or(0, |m| m.len()) >> 10;
    let (kernel, initrd) = (config.kernel(), config.initrd());
    let told = |path: &Path| format!("{} ({} KiB)", path.display(), size(path));
    let there = good(name, format!("{}, {}", told(&kernel), told(&initrd)));
    vec![there, matching(&kernel, &initrd)]
}

/// Whether the modules of the initramfs are this kernel's: others do not load, and the
/// agent's devices never come.
fn matching(kernel: &Path, initrd: &Path) -> Finding {
    let name = "versions";
    match (bzimage::version(kernel).ok().flatten(), modules_for(initrd)) {
        (Some(kernel), Some(modules)) if kernel == modules => {
            good(name, format!("kernel and modules are of {kernel}"))
        }
        (Some(kernel), Some(modules)) => finding(
            name,
            State::Missing,
            format!("the kernel is {kernel}, the initramfs has modules of {modules}"),
            "`vmcache guest build`, or `vmcache mkinitrd` with this kernel's modules",
        ),
        (kernel, _) => finding(
            name,
            State::Note,
            match kernel {
                Some(kernel) => format!("the kernel is {kernel}; no module in the initramfs tells"),
                None => "the kernel does not tell its version".into(),
            },
            "",
        ),
    }
}

/// The version that the first module in an archive is for; `None` where none is seen, as
/// in one that is compressed.
fn modules_for(initrd: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(initrd).ok()?.take(LARGEST).read_to_end(&mut bytes).ok()?;
    let at = bytes.windows(MAGIC.len()).position(|w| w == MAGIC)? + MAGIC.len();
    let rest = bytes.get(at..(at + 128).min(bytes.len()))?;
    let end = rest.iter().position(|b| !b.is_ascii_graphic())?;
    String::from_utf8(rest[..end].to_vec()).ok().filter(|v| !v.is_empty())
}
