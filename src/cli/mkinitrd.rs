//! `vmcache mkinitrd`.

use std::env;
use std::path::PathBuf;

use super::args::{Contents, Mkinitrd};
use super::output::{Failure, PREFLIGHT};
use super::{print, Outcome};
use crate::initrd::{pack, Recipe};

/// Where a package puts the agent.
const INSTALLED: &str = "/usr/libexec/vmcache/vmcache-agent";

/// Packs and tells what was packed.
pub fn mkinitrd(m: &Mkinitrd) -> Outcome {
    let agent = find_agent(&m.contents)?;
    let recipe = Recipe {
        agent,
        kernel_modules: m.kernel_modules.clone(),
        userland: m.contents.userland.clone(),
        extra_modules: m.contents.module.clone(),
        output: m.output.clone(),
    };
    let packed = pack(&recipe)?;
    if m.json.json {
        let json = serde_json::json!({
            "output": recipe.output, "bytes": packed.size, "modules": packed.modules,
            "applets": packed.applets,
        });
        print::json(&json)?;
    } else {
        print::line(format!(
            "{}: {:.1} MiB, {} kernel modules, {} commands",
            recipe.output.display(),
            packed.size as f64 / 1_048_576.0,
            packed.modules.len(),
            packed.applets
        ))?;
    }
    Ok(0)
}

/// The agent that was named, or is beside this program, or where a package puts it.
pub fn find_agent(contents: &Contents) -> Result<PathBuf, Failure> {
    if let Some(agent) = &contents.agent {
        return Ok(agent.clone());
    }
    let beside = env::current_exe().ok().map(|e| e.with_file_name("vmcache-agent"));
    let places: Vec<PathBuf> = beside.into_iter().chain([INSTALLED.into()]).collect();
    let list: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
    places.into_iter().find(|p| p.is_file()).ok_or_else(|| {
        let text = format!("no vmcache-agent at {}: name it with --agent", list.join(" or "));
        Failure::new(PREFLIGHT, text)
    })
}
