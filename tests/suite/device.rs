//! The device that the suite runs on.

use burn::tensor::{Device, FloatDType};
use burn_peft::check_device;

/// In f32 and in every type of 16 bits that it has. `--nocapture` shows how exact it is.
#[test]
fn it_computes_what_it_should() {
    let device = Device::default();
    let types = [FloatDType::BF16, FloatDType::F16].into_iter().filter(|dtype| device.supports_dtype(*dtype));
    let check = check_device(&device, &types.collect::<Vec<_>>()).unwrap();
    println!("{}", check.device().name);
    for deviation in check.deviations() {
        println!("{deviation}");
    }
    assert!(check.largest(FloatDType::F32) > 0.0);
}
