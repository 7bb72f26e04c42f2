//! The operations of burn-peft-ops on the device of the suite, beside the same in f64 on the CPU: values and gradients.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft_ops::{
    CausalMask, TokenTree, attention, cross_entropy, dropped_product, linear, rms_norm, rotate, sum_all,
    swiglu, with_dropout_seed, zero_some,
};
use burn_peft_tests::tolerance::{FORWARD, GRADIENT, IN_BF16, IN_F16, assert_close};

/// Makes a mask for a device.
type MaskOf<'a> = &'a dyn Fn(&Device) -> CausalMask;

/// A device, the type to compute in, and one that holds all numbers.
type Place = (Device, DType, DType);

/// Numbers between -1 and 1 that look like none in particular.
fn numbers<const D: usize>(shape: [usize; D], seed: usize, (device, dtype, held): &Place) -> Tensor<D> {
    let number = |i: usize| ((i * 7 + seed * 131) as f64 * 0.731).sin();
    let numbers: Vec<f64> = (0..shape.iter().product()).map(number).collect();
    let data = TensorData::new(numbers, shape).convert_dtype(*held).convert_dtype(*dtype);
    Tensor::from_data(data, (device, *dtype))
}

/// `f(inputs)`, and the gradients of all inputs for a gradient of the result that is not all ones.
fn results<const N: usize, const D: usize, const E: usize>(
    f: impl Fn([Tensor<D>; N], &Place) -> Tensor<E>,
    shapes: [[usize; D]; N],
    place: &Place,
) -> Vec<TensorData> {
    let mut seed = 0;
    let inputs = shapes.map(|shape| {
        seed += 1;
        numbers(shape, seed, place).require_grad()
    });
    let y = f(inputs.clone(), place);
    let dy = numbers(y.dims(), 9, &(place.0.clone(), y.dtype(), place.2));
    let gradients = (y.clone() * dy).sum().backward();
    let of_inputs = inputs.iter().map(|input| input.grad(&gradients).unwrap().into_data());
    [y.into_data()].into_iter().chain(of_inputs).collect()
}

/// Compares `f` on the device of the suite, in every type that it computes in, with `reference` in f64.
fn compare<const N: usize, const D: usize, const E: usize>(
    name: &str,
    shapes: [[usize; D]; N],
    f: impl Fn([Tensor<D>; N], &Place) -> Tensor<E>,
    reference: impl Fn([Tensor<D>; N], &Place) -> Tensor<E>,
) {
    let device = Device::default().autodiff();
    for (dtype, value, gradient) in
        [(DType::F32, FORWARD, GRADIENT), (DType::F16, IN_F16, IN_F16), (DType::BF16, IN_BF16, IN_BF16)]
    {
        if !device.supports_dtype(dtype) {
            println!("{name}: {device:?} has no {}", dtype.name());
            continue;
        }
        let found = results(&f, shapes, &(device.clone(), dtype, dtype));
        let expected = results(&reference, shapes, &(Device::flex().autodiff(), DType::F64, dtype));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let (what, tolerance) = match i {
                0 => ("value".to_string(), value),
                _ => (format!("gradient of input {i}"), gradient),
            };
            assert_close(&format!("{name}, {what}, {}", dtype.name()), found, expected, tolerance);
        }
    }
}

#[test]
fn norms_gates_and_sums() {
    let norm = |[x]: [Tensor<3>; 1], place: &Place| rms_norm(x, numbers([576], 3, place), 1e-5);
    compare("rms_norm", [[2, 5, 576]], norm, norm);
    let gate = |[gate, up]: [Tensor<2>; 2], _: &Place| swiglu(gate, up);
    compare("swiglu", [[7, 1536]; 2], gate, gate);
    let sum = |[x]: [Tensor<3>; 1], _: &Place| sum_all(x.square());
    compare("sum_all", [[3, 1000, 7]], sum, sum);
}

#[test]
fn products_with_frozen_weights() {
    for [rows, d_in, d_out] in [[1, 576, 192], [8, 33, 20], [70, 576, 1536]] {
        let product = |[x]: [Tensor<3>; 1], place: &Place| {
            let weight = numbers([d_in, d_out], 3, place).detach();
            linear(x, weight, Some(numbers([d_out], 4, place)))
        };
        compare(&format!("linear, {rows} rows"), [[2, rows, d_in]], product, product);
        let transposed = |[x]: [Tensor<2>; 1], place: &Place| {
            linear(x, numbers([d_out, d_in], 3, place).detach().transpose(), None)
        };
        compare(&format!("linear, transposed, {rows} rows"), [[rows, d_in]], transposed, transposed);
    }
}

#[test]
fn rotation() {
    let turn = |[x]: [Tensor<5>; 1], place: &Place| {
        rotate(x, &numbers([6, 64], 3, place), &numbers([6, 64], 4, place))
    };
    compare("rotate", [[2, 6, 3, 2, 64]], turn, turn);
}

/// Two heads of keys and values, each for three of queries.
#[test]
fn attention_with_every_kind_of_mask() {
    let (b, t) = (2, 9);
    let tokens = |device: &Device| {
        let rows = [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]];
        Tensor::<2, Int>::from_data(rows, device).equal_elem(1)
    };
    let tree = TokenTree::new(&[None, Some(0), Some(1), Some(1), Some(3), None, Some(5), Some(6), Some(6)]);
    let masks: [(&str, usize, usize, MaskOf<'_>); 4] = [
        ("all tokens", b, t, &|_| CausalMask::new(t, t)),
        ("padding", b, t, &|device| CausalMask::new(t, t).with_tokens(tokens(device))),
        ("the last token", b, 1, &|_| CausalMask::new(1, t)),
        ("one row", 1, t, &|_| CausalMask::of_tree(tree.clone())),
    ];
    for (name, b, s, mask) in masks {
        let attend = |[q, k, v]: [Tensor<4>; 3], (device, ..): &Place| {
            let q = q.reshape([b, 2, 3, t, 64]).narrow(3, t - s, s);
            attention(q, k, v, &mask(device)).reshape([b, 6, s, 64])
        };
        compare(
            &format!("attention, {name}"),
            [[b, 2, 3 * t, 64], [b, 2, t, 64], [b, 2, t, 64]],
            attend,
            attend,
        );
    }
}

#[test]
fn losses_over_small_and_real_vocabularies() {
    for [rows, vocabulary] in [[9, 300], [3, 49_152]] {
        let targets = |device: &Device| {
            let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919) % vocabulary) as i64).collect();
            Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device.clone().inner())
        };
        let loss =
            |[logits]: [Tensor<2>; 1], (device, ..): &Place| cross_entropy(logits * 8.0, targets(device));
        let reference = |[logits]: [Tensor<2>; 1], (device, ..): &Place| {
            let targets = Tensor::from_inner(targets(device)).unsqueeze_dim::<2>(1);
            log_softmax(logits * 8.0, 1).gather(1, targets).sum().neg()
        };
        compare(&format!("cross_entropy over {vocabulary}"), [[rows, vocabulary]], loss, reference);
    }
}

/// The share that is wanted, the same in backward, and the rest as it was.
#[test]
fn dropout_drops_what_it_should() {
    let place = (Device::default().autodiff(), DType::F32, DType::F32);
    let x = numbers([1000, 64], 1, &place).require_grad();
    let a = numbers([64, 8], 2, &place);
    let y = zero_some(x.clone(), 0.3);
    let dx = x.grad(&y.clone().sum().backward()).unwrap().into_data();
    let (dx, y, x_now) = (dx.iter::<f32>(), y.into_data(), x.clone().into_data());
    let mut dropped = 0;
    for ((dx, y), x) in dx.zip(y.iter::<f32>()).zip(x_now.iter::<f32>()) {
        let is_dropped = dx == 0.0;
        dropped += usize::from(is_dropped);
        assert_eq!(y, if is_dropped { 0.0 } else { x });
    }
    let share = dropped as f64 / 64_000.0;
    assert!((share - 0.3).abs() < 0.01, "{share}");

    let nothing = dropped_product(x.clone(), a.clone(), 0.0).into_data();
    assert_close("without dropout", &nothing, &x.clone().matmul(a.clone()).into_data(), FORWARD);
    let product = |seed| with_dropout_seed(seed, || dropped_product(x.clone(), a.clone(), 0.5)).into_data();
    assert_ne!(product(1), nothing);
    assert_ne!(product(1), product(2));
}
