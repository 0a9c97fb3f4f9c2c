//! The agent that is none: for bare VMs, and tests of what needs no guest.
//!
//! Invariant: it is there at once and always, and can do nothing: each call but
//! Check is [`Error::Unsupported`].

use std::time::Duration;

use super::{Agent, Error, Kind, Outcome, ProcessId, Stream};
use crate::proto::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, GuestDetailsResponse,
    StatsContainerResponse,
};
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};

/// No agent.
#[derive(Clone, Copy, Debug)]
pub struct Noop;

fn no<T>(call: &'static str) -> Outcome<T> {
    Err(Error::Unsupported { call })
}

impl Agent for Noop {
    fn kind(&self) -> Kind {
        Kind::Noop
    }

    fn leave(self: Box<Self>) {}

    fn check(&self, _: Duration) -> Outcome<()> {
        Ok(())
    }

    fn version(&self) -> Outcome<(String, String)> {
        no("Version")
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        no("GetGuestDetails")
    }

    fn create_sandbox(&self, _: CreateSandboxRequest) -> Outcome<()> {
        no("CreateSandbox")
    }

    fn destroy_sandbox(&self) -> Outcome<()> {
        no("DestroySandbox")
    }

    fn create_container(&self, _: CreateContainerRequest) -> Outcome<()> {
        no("CreateContainer")
    }

    fn start_container(&self, _: &str) -> Outcome<()> {
        no("StartContainer")
    }

    fn remove_container(&self, _: &str, _: Duration) -> Outcome<()> {
        no("RemoveContainer")
    }

    fn exec_process(&self, _: &ProcessId, _: Process) -> Outcome<()> {
        no("ExecProcess")
    }

    fn signal_process(&self, _: &ProcessId, _: u32) -> Outcome<()> {
        no("SignalProcess")
    }

    fn wait_process(&self, _: &ProcessId, _: Option<Duration>) -> Outcome<i32> {
        no("WaitProcess")
    }

    fn write_stdin(&self, _: &ProcessId, _: Vec<u8>) -> Outcome<u32> {
        no("WriteStdin")
    }

    fn read_stream(&self, _: &ProcessId, stream: Stream, _: u32) -> Outcome<Vec<u8>> {
        no(match stream {
            Stream::Out => "ReadStdout",
            Stream::Err => "ReadStderr",
        })
    }

    fn close_stdin(&self, _: &ProcessId) -> Outcome<()> {
        no("CloseStdin")
    }

    fn resize_terminal(&self, _: &ProcessId, _: u32, _: u32) -> Outcome<()> {
        no("TtyWinResize")
    }

    fn stats_container(&self, _: &str) -> Outcome<StatsContainerResponse> {
        no("StatsContainer")
    }

    fn pause_container(&self, _: &str) -> Outcome<()> {
        no("PauseContainer")
    }

    fn resume_container(&self, _: &str) -> Outcome<()> {
        no("ResumeContainer")
    }

    fn update_container(&self, _: &str, _: LinuxResources) -> Outcome<()> {
        no("UpdateContainer")
    }

    fn list_processes(&self, _: &str, _: &str) -> Outcome<Vec<u8>> {
        no("ListProcesses")
    }

    fn online_cpu_mem(&self, _: u32, _: bool) -> Outcome<()> {
        no("OnlineCPUMem")
    }

    fn reseed_rng(&self, _: &[u8]) -> Outcome<()> {
        no("ReseedRandomDev")
    }

    fn set_guest_date_time(&self, _: Duration) -> Outcome<()> {
        no("SetGuestDateTime")
    }

    fn copy_file(&self, _: CopyFileRequest) -> Outcome<()> {
        no("CopyFile")
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        no("ListInterfaces")
    }

    fn update_interface(&self, _: Interface) -> Outcome<Interface> {
        no("UpdateInterface")
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        no("ListRoutes")
    }

    fn update_routes(&self, _: Vec<Route>) -> Outcome<Vec<Route>> {
        no("UpdateRoutes")
    }
}
