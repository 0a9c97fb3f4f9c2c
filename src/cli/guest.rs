//! `vmcache guest build`.

use std::path::Path;

use super::args::{Common, GuestBuild};
use super::mkinitrd::find_agent;
use super::output::{Failure, FAILED, PREFLIGHT};
use super::progress::Progress;
use super::{optional_config, print, Outcome};
use crate::initrd::installed::{self, Kernel, INITRAMFS, KERNEL};

/// Makes the guest, and tells what the configuration has to say for it.
pub fn build(common: &Common, g: &GuestBuild) -> Outcome {
    let failed = |e: installed::Error| match e {
        installed::Error::NoKernel { .. } | installed::Error::NoBusybox => {
            Failure::of(PREFLIGHT, &e)
        }
        e => Failure::of(FAILED, &e),
    };
    let kernel = match (&g.kernel, &g.kernel_modules) {
        (Some(image), Some(modules)) => Kernel { image: image.clone(), modules: modules.clone() },
        _ => installed::kernel(Path::new("/")).map_err(failed)?,
    };
    let userland = match &g.contents.userland {
        Some(userland) => userland.clone(),
        None => installed::busybox().map_err(failed)?,
    };
    let agent = find_agent(&g.contents)?;
    let progress = Progress::start("making a guest");
    let packed = installed::build(&kernel, &agent, &userland, &g.contents.module, &g.output);
    drop(progress);
    let packed = packed.map_err(failed)?;
    let (image, initramfs) = (g.output.join(KERNEL), g.output.join(INITRAMFS));
    if g.json.json {
        let json = serde_json::json!({
            "kernel": image, "initrd": initramfs, "from": kernel.image,
            "bytes": packed.size, "modules": packed.modules, "applets": packed.applets,
        });
        print::json(&json)?;
        return Ok(0);
    }
    print::line(format!(
        "{}: kernel {}, initramfs of {:.1} MiB with {} modules and {} commands",
        g.output.display(),
        kernel.image.display(),
        packed.size as f64 / 1_048_576.0,
        packed.modules.len(),
        packed.applets
    ))?;
    let used = optional_config(common)
        .ok()
        .flatten()
        .is_some_and(|c| c.kernel() == image && c.initrd() == initramfs);
    if used {
        print::line("a server that runs already takes it up with `systemctl reload vmcache`")?;
    } else {
        print::line("for it, the configuration's [hypervisor.qemu] has to say")?;
        print::line(format!("kernel = {:?}", image.display()))?;
        print::line(format!("initrd = {:?}", initramfs.display()))?;
    }
    Ok(0)
}
